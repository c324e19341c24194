"""Other people's formats; the method reads whole without them."""
