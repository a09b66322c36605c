package audit

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// MaxRecord bounds one record, in bytes without its newline.
const MaxRecord = 16 << 10

// timeLayout is RFC 3339 in UTC with all nine digits, so that it sorts.
const timeLayout = "2006-01-02T15:04:05.000000000Z"

var errRecord = errors.New("not a record")

// phases spells kms.Phase in records.
var phases = [...]string{
	kms.PhaseIntent:  "intent",
	kms.PhaseOutcome: "outcome",
	kms.PhaseRefused: "refused",
	kms.PhaseSystem:  "system",
}

// check refuses events that have no canonical record.
func check(e *kms.Event) error {
	switch {
	case e.Phase < kms.PhaseIntent || e.Phase > kms.PhaseSystem:
		return fmt.Errorf("%w: audit: phase %d", dek.ErrInvalid, e.Phase)
	case e.Operation == "" || e.Principal == "":
		return fmt.Errorf("%w: audit: event without operation or principal", dek.ErrInvalid)
	case e.Count < 0:
		return fmt.Errorf("%w: audit: count %d", dek.ErrInvalid, e.Count)
	case e.Time.Year() < 1970 || e.Time.Year() > 9999:
		return fmt.Errorf("%w: audit: year %d", dek.ErrInvalid, e.Time.Year())
	}
	return nil
}

// appendBody appends what follows the sequence in the record of e, which check
// has passed: FORMAT.md, "Record".
func appendBody(b []byte, e *kms.Event) []byte {
	b = append(b, `,"time":"`...)
	b = e.Time.UTC().AppendFormat(b, timeLayout)
	b = append(b, `","phase":"`...)
	b = append(b, phases[e.Phase]...)
	b = append(b, '"')
	b = appendUint(b, `,"intent":`, e.Intent)
	b = appendString(b, `,"operation":"`, string(e.Operation))
	b = appendString(b, `,"principal":"`, e.Principal)
	b = appendString(b, `,"serial":"`, e.Serial)
	b = appendString(b, `,"remote":"`, e.Remote)
	b = appendString(b, `,"correlation":"`, e.Correlation)
	b = appendString(b, `,"object":"`, e.Object)
	b = appendUint(b, `,"version":`, uint64(e.Version))
	b = appendUint(b, `,"count":`, uint64(e.Count))
	b = appendString(b, `,"rule":"`, e.Rule)
	b = appendString(b, `,"result":"`, e.Result)
	b = appendUint(b, `,"change":`, e.Change)
	if len(e.State) > 0 {
		b = append(b, `,"state":"`...)
		b = base64.StdEncoding.AppendEncode(b, e.State)
		b = append(b, '"')
	}
	b = appendString(b, `,"note":"`, e.Note)
	return append(b, '}')
}

// appendRecord appends the record of e, whose body is given, without a newline.
func appendRecord(b []byte, seq uint64, body []byte) []byte {
	return append(appendUint(b, `{"seq":`, seq), body...)
}

func appendUint(b []byte, name string, v uint64) []byte {
	if v == 0 {
		return b
	}
	return strconv.AppendUint(append(b, name...), v, 10)
}

// appendString escapes what JSON demands, in one way only: \" \\ and \u00xx for
// control characters. Bytes that are not UTF-8 become U+FFFD.
func appendString(b []byte, name, s string) []byte {
	if s == "" {
		return b
	}
	b = append(b, name...)
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			switch {
			case c == '"' || c == '\\':
				b = append(b, '\\', c)
			case c < 0x20 || c == 0x7f:
				b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			default:
				b = append(b, c)
			}
			i++
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		b = utf8.AppendRune(b, r)
		i += n
	}
	return append(b, '"')
}

const hexDigits = "0123456789abcdef"

// parseRecord reads one record without its newline. It accepts exactly what
// appendRecord writes: parsing and appending again gives the same bytes.
func parseRecord(line []byte) (seq uint64, e kms.Event, err error) {
	if len(line) > MaxRecord {
		return 0, kms.Event{}, fmt.Errorf("%w: %d bytes", errRecord, len(line))
	}
	p := parser{rest: line}
	seq = p.number(`{"seq":`, math.MaxUint64)
	at := p.token(`,"time":"`)
	phase := p.token(`,"phase":"`)
	e.Intent = p.number(`,"intent":`, math.MaxUint64)
	e.Operation = kms.Operation(p.text(`,"operation":"`))
	e.Principal = p.text(`,"principal":"`)
	e.Serial = p.text(`,"serial":"`)
	e.Remote = p.text(`,"remote":"`)
	e.Correlation = p.text(`,"correlation":"`)
	e.Object = p.text(`,"object":"`)
	e.Version = dek.Version(p.number(`,"version":`, math.MaxUint32))
	e.Count = int(p.number(`,"count":`, math.MaxInt))
	e.Rule = p.text(`,"rule":"`)
	e.Result = p.text(`,"result":"`)
	e.Change = p.number(`,"change":`, math.MaxUint64)
	e.State = p.bytes(`,"state":"`)
	e.Note = p.text(`,"note":"`)
	if !p.skip("}") || len(p.rest) != 0 || p.bad || seq == 0 {
		return 0, kms.Event{}, errRecord
	}
	// time.Parse takes a comma for the point (the fuzzer found it).
	if e.Time, err = time.Parse(timeLayout, string(at)); err != nil || len(at) != len(timeLayout) || at[19] != '.' {
		return 0, kms.Event{}, fmt.Errorf("%w: time", errRecord)
	}
	for i, name := range phases {
		if name != "" && name == string(phase) {
			e.Phase = kms.Phase(i)
		}
	}
	if err := check(&e); err != nil {
		return 0, kms.Event{}, fmt.Errorf("%w: %w", errRecord, err)
	}
	return seq, e, nil
}

// A parser reads fields in their fixed order; a field that is not there is
// zero, one that is there and zero is bad.
type parser struct {
	rest []byte
	bad  bool
}

func (p *parser) skip(s string) bool {
	if len(p.rest) < len(s) || string(p.rest[:len(s)]) != s {
		return false
	}
	p.rest = p.rest[len(s):]
	return true
}

func (p *parser) number(name string, limit uint64) uint64 {
	if p.bad || !p.skip(name) {
		return 0
	}
	n := 0
	for n < len(p.rest) && '0' <= p.rest[n] && p.rest[n] <= '9' {
		n++
	}
	v, err := strconv.ParseUint(string(p.rest[:n]), 10, 64)
	if err != nil || v == 0 || v > limit || p.rest[0] == '0' {
		p.bad = true
		return 0
	}
	p.rest = p.rest[n:]
	return v
}

// token reads up to the next quote, without escapes.
func (p *parser) token(name string) []byte {
	if p.bad || !p.skip(name) {
		return nil
	}
	n := bytes.IndexByte(p.rest, '"')
	if n <= 0 {
		p.bad = true
		return nil
	}
	v := p.rest[:n]
	p.rest = p.rest[n+1:]
	return v
}

func (p *parser) bytes(name string) []byte {
	t := p.token(name)
	if t == nil {
		return nil
	}
	v, err := base64.StdEncoding.Strict().AppendDecode(nil, t)
	if err != nil || len(v) == 0 || bytes.ContainsAny(t, "\r\n") {
		p.bad = true
		return nil
	}
	return v
}

func (p *parser) text(name string) string {
	if p.bad || !p.skip(name) {
		return ""
	}
	n := 0
	for n < len(p.rest) && p.rest[n] != '"' && p.rest[n] != '\\' && p.rest[n] >= 0x20 && p.rest[n] != 0x7f {
		n++
	}
	if n < len(p.rest) && p.rest[n] == '"' && n > 0 { // no escapes: the usual case
		v := string(p.rest[:n])
		p.rest = p.rest[n+1:]
		p.bad = p.bad || !utf8.ValidString(v)
		return v
	}
	return p.escaped()
}

func (p *parser) escaped() string {
	var v []byte
	for i := 0; i < len(p.rest); i++ {
		switch c := p.rest[i]; {
		case c == '"':
			p.rest = p.rest[i+1:]
			p.bad = p.bad || len(v) == 0 || !utf8.Valid(v)
			return string(v)
		case c < 0x20 || c == 0x7f:
			p.bad = true
			return ""
		case c == '\\':
			r, n := unescape(p.rest[i:])
			if n == 0 {
				p.bad = true
				return ""
			}
			v = append(v, r)
			i += n - 1
		default:
			v = append(v, c)
		}
	}
	p.bad = true
	return ""
}

// unescape reads one escape of the kinds appendString writes; 0 if none.
func unescape(b []byte) (c byte, n int) {
	if len(b) >= 2 && (b[1] == '"' || b[1] == '\\') {
		return b[1], 2
	}
	if len(b) < 6 || string(b[:4]) != `\u00` {
		return 0, 0
	}
	hi, lo := bytes.IndexByte([]byte(hexDigits), b[4]), bytes.IndexByte([]byte(hexDigits), b[5])
	if hi < 0 || lo < 0 {
		return 0, 0
	}
	if c = byte(hi<<4 | lo); c >= 0x20 && c != 0x7f {
		return 0, 0
	}
	return c, 6
}

// sequenceOf reads the sequence at the start of a record, 0 if there is none.
func sequenceOf(line []byte) uint64 {
	const head = `{"seq":`
	if len(line) <= len(head) || string(line[:len(head)]) != head {
		return 0
	}
	var v uint64
	for _, c := range line[len(head):] {
		if c < '0' || c > '9' {
			return v
		}
		v = v*10 + uint64(c-'0')
	}
	return 0
}
