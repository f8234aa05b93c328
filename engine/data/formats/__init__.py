"""Every data format that people have, read into conversations through one interface."""
