"""What a frozen encoder is worth: `contrastive-mm vision evaluate`."""
