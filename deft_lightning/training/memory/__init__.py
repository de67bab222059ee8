"""What a fit takes of memory: estimated from shapes before its first step, and compared with what the device has."""
