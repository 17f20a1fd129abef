"""A method tied to a model: the record of what it keeps, what reads that record, and what runs its steps."""
