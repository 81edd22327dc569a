"""What the report's page is made of: tables, charts, sections and commands as data; template, style and scripts."""
