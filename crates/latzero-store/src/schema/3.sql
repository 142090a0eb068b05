-- Schema 3. Parked calls whose attempts all failed are kept for a while.

ALTER TABLE parked_calls ADD COLUMN died INTEGER;
ALTER TABLE parked_calls ADD COLUMN cause TEXT;
