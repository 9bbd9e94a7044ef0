"""The wing of load-partial: fits are loaded, shapes adapted, the rest initialised, training set up."""
