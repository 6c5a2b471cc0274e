"""Views of images: crops, flips, colour, blur, RandAugment, mixing, and the published recipes."""
