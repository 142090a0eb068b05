-- Schema 5. An answer that waits knows which trigger was called.

ALTER TABLE parked_answers ADD COLUMN process TEXT NOT NULL DEFAULT '';
