"""One self-contained HTML page from dictionaries and a store."""
