"""What answers chats for the terminal and for files: a model in this process, or a server."""
