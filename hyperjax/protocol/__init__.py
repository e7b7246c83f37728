"""How to compare, so that what is reported holds: seeds, folds, intervals, multiplicity."""
