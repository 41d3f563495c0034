"""What a token is: tokenizers, the bytes of their tokens, and what two vocabularies share."""
