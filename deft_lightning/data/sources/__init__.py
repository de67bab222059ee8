"""1. Where rows come from: files, folders, the hub, generated tasks."""
