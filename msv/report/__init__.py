"""One self-contained page of all that is published: tables to sort, plots, configs, records."""
