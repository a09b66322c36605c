package audit

import "github.com/keyward/keyward/kms"

// What tests outside the package look at.
var (
	ParseRecord = parseRecord
	ParseBody   = parseBody
	SplitNotes  = splitNotes
)

// EncodeRecord is the record of e, which must be valid.
func EncodeRecord(seq uint64, e kms.Event) []byte {
	return appendRecord(nil, seq, appendBody(nil, &e))
}

// Body is the text of c that is signed.
func (c *Checkpoint) Body() string { return c.body() }

// Sign signs c with the clock it has.
func (c *Checkpoint) Sign(cfg Config) error { return c.sign(cfg.Signer) }
