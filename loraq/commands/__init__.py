"""The commands of `loraq`, a file each: what is typed, and what is printed. Imported when one is called."""
