"""From a folder to checked photos with captions."""
