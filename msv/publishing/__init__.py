"""What is made of results: tables again from records, what is published of them, and its index."""
