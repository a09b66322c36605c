package hsm

import (
	"encoding/binary"
	"errors"
)

// errShort answers every malformed frame or record.
var errShort = errors.New("malformed")

// A decoder reads big-endian fields and checks lengths before slicing. After
// the first fault every read gives zero; done reports it.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if d.bad || n > len(d.b) {
		d.bad = true
		return nil
	}
	t := d.b[:n:n]
	d.b = d.b[n:]
	return t
}

func (d *decoder) u8() byte {
	if t := d.take(1); t != nil {
		return t[0]
	}
	return 0
}

func (d *decoder) u16() uint16 {
	if t := d.take(2); t != nil {
		return binary.BigEndian.Uint16(t)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if t := d.take(8); t != nil {
		return binary.BigEndian.Uint64(t)
	}
	return 0
}

func (d *decoder) flag() bool {
	v := d.u8()
	if v > 1 {
		d.bad = true
	}
	return v == 1
}

// bytes16 reads a field after its two-byte length. It aliases the input.
func (d *decoder) bytes16() []byte { return d.take(int(d.u16())) }

func (d *decoder) str() string { return string(d.bytes16()) }

func (d *decoder) id() (id [16]byte) {
	copy(id[:], d.take(16))
	return id
}

// rest takes what is left.
func (d *decoder) rest() []byte { return d.take(len(d.b)) }

// done returns errShort after any fault or if bytes are left over.
func (d *decoder) done() error {
	if d.bad || len(d.b) > 0 {
		return errShort
	}
	return nil
}

func appendBytes16(b, v []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(v)))
	return append(b, v...)
}

func appendStr(b []byte, s string) []byte { return appendBytes16(b, []byte(s)) }

func appendFlag(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}
