"""What every process shares: messages, hashes, configuration, the paged KV pool and the model.

Imports go one way: errors, blockhash, sampling <- messages, sequence <- config, metrics, link,
registry, host <- kv <- model. Nothing here imports kvtransfer, prefill, decode or router.
"""
