"""What is learned: one file per stage, all of them run by the same loop and step."""
