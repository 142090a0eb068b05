-- Schema 2. The file of a persistent block, so that its record can be made again from its row.

ALTER TABLE memory_blocks ADD COLUMN file TEXT;
