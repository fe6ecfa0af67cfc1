"""The recipes: each file is a whole job, made to be read, run and copied."""
