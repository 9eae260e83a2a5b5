"""An adapter as files and as pictures."""
