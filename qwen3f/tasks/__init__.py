"""Tasks: questions with right answers, and a judge; each one object for data, rewards and evaluation."""
