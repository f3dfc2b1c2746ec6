"""Everything that the device needs of a finished run, in one folder."""
