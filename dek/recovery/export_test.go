package recovery

import "github.com/keyward/keyward/dek"

var (
	Mul     = mul
	Inverse = inverse
	Split   = split
)

// WithY returns s with another share value.
func (s Share) WithY(y *dek.Key) Share { s.y = y; return s }

// WithIndex returns s with another number.
func (s Share) WithIndex(i byte) Share { s.index = i; return s }

// WithM returns s saying that m shares suffice.
func (s Share) WithM(m byte) Share { s.m = m; return s }

// Y returns the share value.
func (s Share) Y() *dek.Key { return s.y }
