"""What the command line and a terminal have to do with each other: colours, help, completion."""
