"""The model of a run, its loss and its optimizer."""
