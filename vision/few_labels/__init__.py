"""Classifiers from few labels: fine-tuning, distillation, SimCLR v2's three stages."""
