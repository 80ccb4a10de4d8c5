"""Tables, plots and pages, made from stored runs only."""
