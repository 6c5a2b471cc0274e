"""Where images come from, and how they get from there to the device."""
