-- Schema 6. A block of a sealed pool knows what its content is bound to.

ALTER TABLE memory_blocks ADD COLUMN sealed TEXT;
