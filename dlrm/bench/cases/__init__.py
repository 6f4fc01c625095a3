"""What `dlrm bench CASE` measures, a module each."""
