"""What only true size needs; the method reads whole without it."""
