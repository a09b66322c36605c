package rpc_test

import (
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// setField sets a scalar field by its name in kms.proto.
func setField(m proto.Message, field string, v any) {
	r := m.ProtoReflect()
	f := r.Descriptor().Fields().ByName(protoreflect.Name(field))
	if f == nil {
		panic("no field " + field + " in " + string(r.Descriptor().FullName()))
	}
	r.Set(f, protoreflect.ValueOf(v))
}

// lenient encodes strings that are not UTF-8 too, as a client of ours would
// not, and so says nothing of errors.
func lenient(m proto.Message) []byte {
	b, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
	if err != nil {
		return []byte{0xff}
	}
	return b
}
