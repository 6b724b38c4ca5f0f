package rpc

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/grpc"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	v1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	v1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

// The API lives in the packages conveyor_etl.*. Clients were also built from
// sources in which the packages were called conveyor.*, with the same messages;
// only the path of a call differs. Every service is served under both names.
const (
	apiRoot   = "conveyor_etl"
	aliasRoot = "conveyor"
)

// service is one service and what implements it.
type service struct {
	desc *grpc.ServiceDesc
	impl any
}

// registerAll puts services, their aliases, health and reflection on srv.
func registerAll(srv *grpc.Server, health *healthReporter, services []service) error {
	var names []string
	for _, sv := range services {
		alias, err := aliasDesc(sv.desc)
		if err != nil {
			return err
		}
		srv.RegisterService(sv.desc, sv.impl)
		srv.RegisterService(alias, sv.impl)
		names = append(names, sv.desc.ServiceName, alias.ServiceName)
	}
	health.announce(append(names, "", healthgrpc.Health_ServiceDesc.ServiceName))
	healthgrpc.RegisterHealthServer(srv, health)

	files, err := aliasFiles(services)
	if err != nil {
		return err
	}
	options := reflection.ServerOptions{
		Services:           srv,
		DescriptorResolver: aliasResolver{files},
	}
	v1.RegisterServerReflectionServer(srv, reflection.NewServerV1(options))
	v1alpha.RegisterServerReflectionServer(srv, reflection.NewServer(options))
	return nil
}

// aliasDesc copies a service description under its other package name.
func aliasDesc(d *grpc.ServiceDesc) (*grpc.ServiceDesc, error) {
	rest, ok := strings.CutPrefix(d.ServiceName, apiRoot+".")
	if !ok {
		return nil, fmt.Errorf("rpc: service %s is not of package %s", d.ServiceName, apiRoot)
	}
	file, ok := d.Metadata.(string)
	if !ok {
		return nil, fmt.Errorf("rpc: service %s does not name its file", d.ServiceName)
	}
	return &grpc.ServiceDesc{
		ServiceName: aliasRoot + "." + rest,
		HandlerType: d.HandlerType,
		Methods:     d.Methods,
		Streams:     d.Streams,
		Metadata:    aliasPath(file),
	}, nil
}

// aliasPath moves a file of the API into the alias's folder.
func aliasPath(path string) string {
	if rest, ok := strings.CutPrefix(path, apiRoot+"/"); ok {
		return aliasRoot + "/" + rest
	}
	return path
}

// aliasType renames a fully qualified type reference.
func aliasType(name string) string {
	if rest, ok := strings.CutPrefix(name, "."+apiRoot+"."); ok {
		return "." + aliasRoot + "." + rest
	}
	return name
}

// aliasFiles rewrites the descriptors of every file that services needs, so that
// reflection can describe the alias names as well.
func aliasFiles(services []service) (*protoregistry.Files, error) {
	originals := map[string]protoreflect.FileDescriptor{}
	var collect func(fd protoreflect.FileDescriptor)
	collect = func(fd protoreflect.FileDescriptor) {
		if !strings.HasPrefix(fd.Path(), apiRoot+"/") || originals[fd.Path()] != nil {
			return
		}
		originals[fd.Path()] = fd
		for i := range fd.Imports().Len() {
			collect(fd.Imports().Get(i).FileDescriptor)
		}
	}
	for _, sv := range services {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(sv.desc.ServiceName))
		if err != nil {
			return nil, fmt.Errorf("rpc: descriptor of %s: %w", sv.desc.ServiceName, err)
		}
		collect(d.ParentFile())
	}

	files := new(protoregistry.Files)
	var add func(path string) error
	add = func(path string) error {
		fd := originals[path]
		if fd == nil {
			return nil
		}
		if _, err := files.FindFileByPath(aliasPath(path)); err == nil {
			return nil
		}
		for i := range fd.Imports().Len() {
			if err := add(fd.Imports().Get(i).Path()); err != nil {
				return err
			}
		}
		alias, err := protodesc.NewFile(renameFile(protodesc.ToFileDescriptorProto(fd)), aliasResolver{files})
		if err != nil {
			return fmt.Errorf("rpc: alias of %s: %w", path, err)
		}
		return files.RegisterFile(alias)
	}
	for _, path := range slices.Sorted(maps.Keys(originals)) {
		if err := add(path); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// renameFile returns a copy of f with its package, its path and every reference
// to a type of the API renamed.
func renameFile(f *descriptorpb.FileDescriptorProto) *descriptorpb.FileDescriptorProto {
	f = proto.Clone(f).(*descriptorpb.FileDescriptorProto)
	f.Name = proto.String(aliasPath(f.GetName()))
	f.Package = proto.String(aliasRoot + strings.TrimPrefix(f.GetPackage(), apiRoot))
	for i, dep := range f.Dependency {
		f.Dependency[i] = aliasPath(dep)
	}
	for _, m := range f.MessageType {
		renameMessage(m)
	}
	for _, sv := range f.Service {
		for _, m := range sv.Method {
			m.InputType = proto.String(aliasType(m.GetInputType()))
			m.OutputType = proto.String(aliasType(m.GetOutputType()))
		}
	}
	return f
}

func renameMessage(m *descriptorpb.DescriptorProto) {
	for _, fd := range m.Field {
		if fd.TypeName != nil {
			fd.TypeName = proto.String(aliasType(fd.GetTypeName()))
		}
	}
	for _, nested := range m.NestedType {
		renameMessage(nested)
	}
}

// aliasResolver finds the alias files first and everything else where generated
// code registers it.
type aliasResolver struct{ files *protoregistry.Files }

// FindFileByPath implements protodesc.Resolver.
func (r aliasResolver) FindFileByPath(path string) (protoreflect.FileDescriptor, error) {
	if fd, err := r.files.FindFileByPath(path); err == nil {
		return fd, nil
	}
	return protoregistry.GlobalFiles.FindFileByPath(path)
}

// FindDescriptorByName implements protodesc.Resolver.
func (r aliasResolver) FindDescriptorByName(name protoreflect.FullName) (protoreflect.Descriptor, error) {
	if d, err := r.files.FindDescriptorByName(name); err == nil {
		return d, nil
	}
	return protoregistry.GlobalFiles.FindDescriptorByName(name)
}
