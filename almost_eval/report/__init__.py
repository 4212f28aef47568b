"""Results for people: in a terminal, as one page, as tables for other documents."""
