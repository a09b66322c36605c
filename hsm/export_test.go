package hsm

import (
	"io"

	"github.com/keyward/keyward/dek"
)

// White-box access for tests.
var (
	Guard         = guard
	StatusOf      = statusOf
	ErrorOf       = errorOf
	SealHeader    = sealHeader
	SealSignerID  = sealSignerID
	RSASealedForm = rsaSealedForm
)

// Statuses returns the table of classes.
func Statuses() map[byte]error {
	m := map[byte]error{}
	for _, s := range statuses {
		m[s.status] = s.class
	}
	return m
}

// CheckURI parses a token URI.
func CheckURI(s string) error {
	_, err := parseURI(s)
	return err
}

// URIParts parses a token URI into label, serial, model, manufacturer, pin-source.
func URIParts(s string) ([5]string, int, error) {
	u, err := parseURI(s)
	return [5]string{u.label, u.serial, u.model, u.manufacturer, u.pinSource}, u.slot, err
}

// ReadFrames splits a stream and returns the frames and what ended it.
func ReadFrames(r io.Reader) (seqs []uint32, codes []byte, bodies [][]byte, err error) {
	f := newFrameReader(r)
	for {
		fr, err := f.next()
		if err != nil {
			return seqs, codes, bodies, err
		}
		seqs, codes = append(seqs, fr.seq), append(codes, fr.code)
		bodies = append(bodies, append([]byte{}, fr.body...))
	}
}

// FrameReaderBuffer reads one frame, then asks for the next, and returns the
// reader's whole buffer.
func FrameReaderBuffer(r io.Reader) []byte {
	f := newFrameReader(r)
	for {
		if _, err := f.next(); err != nil {
			return f.buf
		}
	}
}

// WriteFrame writes one frame.
func WriteFrame(w io.Writer, seq uint32, code byte, body []byte) error {
	return (&frameWriter{w: w}).send(seq, code, body)
}

// ParseHello and the next two parse and encode again.
func ParseHello(b []byte) ([]byte, error) {
	h, err := parseHello(b)
	if err != nil {
		return nil, err
	}
	return h.append(nil), nil
}

// ParseCapabilities parses and encodes again.
func ParseCapabilities(b []byte) ([]byte, error) {
	d := &decoder{b: b}
	c := parseCapabilities(d)
	if err := d.done(); err != nil {
		return nil, err
	}
	return c.append(nil), nil
}

// ParseRSASealed parses and encodes again.
func ParseRSASealed(b []byte) ([]byte, error) {
	s, err := parseRSASealed(b)
	if err != nil {
		return nil, err
	}
	return s.append(nil), nil
}

// rsaSealedForm returns payload and signed digest of a sealed key of fixed parts.
func rsaSealedForm(root dek.ObjectID, place, ciphertext, signature []byte) (sealed, digest []byte) {
	s := rsaSealed{hash: codeHash(1), sigAlg: sigECDSA, ciphertext: ciphertext, signature: signature}
	header := sealHeader(algTokenRSA, root)
	return s.append(header), s.digest(header, place)
}

// LastWords feeds text to the filter of a child's standard error.
func LastWords(text string) string {
	var w lastWords
	_, _ = io.WriteString(&w, text)
	return w.String()
}

// FrameWriterLeftover queues two frames, the second too large for the buffer of
// the first, and returns that buffer.
func FrameWriterLeftover(first, second []byte) []byte {
	w := &frameWriter{w: io.Discard}
	_ = w.post(1, 0, first, 3)
	old := w.buf
	_ = w.post(2, 0, second, 3)
	return old
}
