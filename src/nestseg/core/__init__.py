"""Words that every floor uses: records, class tables, errors, sizes, image files."""
