"""Several runs, one after the other, each from the results of earlier ones. Imports no torch: that is for the runs."""
