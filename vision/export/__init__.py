"""An encoder in other people's formats."""
