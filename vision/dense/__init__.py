"""Detection and segmentation transfer."""
