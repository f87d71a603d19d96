"""The intermediate representation: recurrence equations, their printer, parser and verifier."""
