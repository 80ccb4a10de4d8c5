"""What a run measured: the journal in its folder first, MLflow after it, never in the way."""
