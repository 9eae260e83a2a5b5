"""What is learned, and what it gives away: measures that compare trainings."""
