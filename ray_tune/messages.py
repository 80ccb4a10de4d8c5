"""Keys of what a trial sends to its study through Ray."""

# A rank has started; a validation's optimizer step; the driver's last word.
STARTED, STEP, OUTCOME = "started", "step", "outcome"
# With OUTCOME: why it failed (empty if it did not), why a first attempt did, and how long training
# itself took.
FAILURE, FIRST_FAILURE, TRAINING_SECONDS = "failure", "first_failure", "training_seconds"
