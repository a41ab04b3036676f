"""What any program needs: files, devices, names, options, tables."""
