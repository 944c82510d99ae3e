"""What generates parts of the pages: options, figures, examples, and the picture of a terminal."""
