"""The join: is a cached token id the same token to the student?"""
