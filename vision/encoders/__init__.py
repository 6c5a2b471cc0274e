"""Image encoders: the libraries' and the papers', with feature maps for dense tasks."""
