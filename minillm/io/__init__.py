"""Other people's files, in and out: formats of chats and rankings, chat templates, Hugging Face's layout."""
