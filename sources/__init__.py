"""What other people write: so far, the ways in which models put their answers."""
